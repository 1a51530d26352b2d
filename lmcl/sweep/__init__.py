"""Many runs that differ in one thing: splits or seeds, of one configuration or of a ladder."""
