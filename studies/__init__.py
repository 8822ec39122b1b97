"""What was measured, by commands that anyone can repeat: see README.md here."""
