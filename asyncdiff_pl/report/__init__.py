"""What a run would take, and what runs gave."""
