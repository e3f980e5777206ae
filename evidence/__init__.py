"""What the studies are made of: declared runs, their figures on disk, and what these show."""
