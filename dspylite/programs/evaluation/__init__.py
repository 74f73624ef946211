"""Measuring a program over a set of examples, and the usual metrics."""
