"""What training at any size needs and a first reading may skip: see README.md here."""
