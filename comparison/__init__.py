"""What the tests and the benchmark measure against: the original program's forms, other engines, and how."""
