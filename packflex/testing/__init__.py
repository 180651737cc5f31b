"""Oracles, inputs and tolerances for tests of attention, for packflex's own tests and for its users'."""
