"""Operators: functions on tensors, without parameters, each with its definition as a `*_reference` function."""
