"""The semantic labels that are of no stuff, the same in data sets and in networks."""

THINGS = 0  # of every thing
IGNORE = 255  # of void
