"""Networks whose output is a map."""
