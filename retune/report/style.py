"""The page's style sheet: light and dark, wide and narrow, on paper.

A Python module and not a file beside it, so that code fingerprints and installs cover it.
Colours are variables: plots refer to them, so one SVG serves both schemes.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1c2024; --soft: #5d656e; --rule: #e2e0db; --tint: #f3f1ec;
  --base: #66717c; --tuned: #1f6feb; --merged: #b8560f; --good: #17754a; --bad: #b3261e; --other: #8250c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e8e6e1; --soft: #a0a8b0; --rule: #343a40; --tint: #23282d;
    --base: #97a3ae; --tuned: #6cb0ff; --merged: #f0a05a; --good: #5cc795; --bad: #ff8a80; --other: #c3a2f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
}
main, .top { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
.top { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0 .9rem; }
.lede { font-size: 1.1rem; }
.soft, figcaption, caption, .note { color: var(--soft); }
.note, figcaption { font-size: .86rem; line-height: 1.45; }
.good { color: var(--good); } .bad { color: var(--bad); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; overflow-wrap: anywhere; }
section { padding: 2rem 0; border-top: 1px solid var(--rule); }
section:first-child { border-top: 0; padding-top: 1.2rem; }
nav {
  position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--rule);
  margin-top: 1.2rem;
}
nav ul {
  display: flex; gap: 1.2rem; max-width: 68rem; margin: 0 auto; padding: .6rem 1.25rem; list-style: none;
  overflow-x: auto; white-space: nowrap; font-size: .9rem; scrollbar-width: none;
}
a { color: var(--tuned); text-decoration: none; } a:hover { text-decoration: underline; }
nav a { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .85rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .86rem; }
.card .name { color: inherit; font-weight: 600; }
.badge {
  display: inline-block; font-size: .72rem; font-weight: 600; letter-spacing: .02em; color: var(--other);
  border: 1px solid currentColor; border-radius: 1rem; padding: .05rem .5rem; vertical-align: .1em;
}
.base .name { color: var(--base); } .tuned .name { color: var(--tuned); } .merged .name { color: var(--merged); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 1rem 0; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem; }
.plots figure { margin: 0; }
figure > b { display: block; font-size: .95rem; margin-bottom: .4rem; }
figcaption { margin-top: .5rem; }
figure table { width: 100%; }
svg.plot { display: block; width: 100%; max-width: 34rem; height: auto; }
svg.plot text { font-family: inherit; }
svg.plot [aria-roledescription="circle"]:hover { stroke: var(--ink); stroke-width: 1.5px; opacity: 1; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 50%; }
caption { text-align: left; font-size: .86rem; padding-bottom: .3rem; }
th, td { padding: .36rem .8rem .36rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; font-size: .86rem; color: var(--soft); white-space: nowrap; }
tbody th { color: var(--ink); font-size: inherit; }
td.n, th.n { text-align: right; white-space: nowrap; }
td small, th small { color: var(--soft); display: block; font-weight: 400; white-space: nowrap; }
.bar { display: block; height: .35rem; border-radius: .2rem; background: var(--tuned); margin-top: .25rem; }
details { margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
.example {
  background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .4rem 1rem; margin: .4rem 0;
}
.example summary { font-weight: 500; overflow-wrap: anywhere; }
h4 { margin: 1.3rem 0 .3rem; font-size: .95rem; }
.example .change { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; margin-right: .6rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .4rem 1.6rem; }
.pair h4 { margin: .6rem 0 .2rem; font-size: .9rem; color: var(--soft); }
ol.passages { margin: 0; padding-left: 1.5rem; font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; }
ol.passages li { margin: .4rem 0; }
.relevant { border-left: 3px solid var(--good); padding-left: .6rem; }
.relevant::before { content: "relevant "; color: var(--good); font-weight: 600; font-size: .82rem; }
.suspected { border-left: 3px solid var(--bad); padding-left: .6rem; }
.suspected::before { content: "suspected "; color: var(--bad); font-weight: 600; font-size: .82rem; }
.wanted { font-size: .9rem; max-width: none; overflow-wrap: anywhere; }
pre {
  background: var(--tint); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45;
}
footer { padding: 1.5rem 0 3rem; color: var(--soft); font-size: .86rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  .top { padding-top: 1.4rem; } h1 { font-size: 1.5rem; }
  main, .top, nav ul { padding-left: .9rem; padding-right: .9rem; }
  figure { padding: .8rem .7rem; } table { min-width: 100%; } th, td { padding-right: .6rem; }
  td small, th small { font-size: .74rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; } .card { padding: .65rem .7rem; }
  .card b { font-size: 1.3rem; } .by-three { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .4rem; }
  .by-three .card { padding: .55rem .5rem; } .by-three .card span { font-size: .76rem; overflow-wrap: anywhere; }
}
@media print { nav { display: none; } section, figure, .example { break-inside: avoid; } }
"""
