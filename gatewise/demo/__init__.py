"""The demo: from a name to a trained, measured, shipped network, and one page that shows it."""
