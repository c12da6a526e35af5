"""Dense-prediction networks, whose output is a map."""
