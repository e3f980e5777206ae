"""What can be typed, and the values that it is settled into. No torch."""
