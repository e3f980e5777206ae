"""What tests and benchmark measure against: the original program's forms, other engines; and how to count."""
