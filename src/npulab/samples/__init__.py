"""Networks and images that the project ships; README.md says what each is."""
