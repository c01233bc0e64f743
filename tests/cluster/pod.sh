#!/bin/sh
# Submit command: runs a job in a folder of its own, which holds the sources and nothing else, as a pod does.
pod=$(mktemp -d "$PODS/XXXXXX")
cp -r Snakefile workflow retune profiles envs toy.yaml "$pod"
(cd "$pod" && sh "$1" >said.txt 2>&1 && echo success >ended || echo failed >ended) >/dev/null 2>&1 &
echo "$pod"
