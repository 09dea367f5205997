"""What a run needs and what a machine can do, known before a device is booked; no torch."""
