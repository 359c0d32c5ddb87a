"""Makes servers of the tests start sooner: a quarter of an import goes to a collector that finds no garbage."""

import gc

gc.set_threshold(100_000, 20, 20)
