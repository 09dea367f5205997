"""Sizes, times and limits of a run before a device is booked: integers and arithmetic, no torch."""
