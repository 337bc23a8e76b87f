"""All the faults at random, under traffic, with books that must balance after each: `make soak`."""
