"""What is measured, on which machine, and how it is kept and shown: JSON, tables, pictures."""
