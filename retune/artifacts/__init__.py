"""What each artifact of a run is: the settings that it uses, what it is made from, and where it lies."""
