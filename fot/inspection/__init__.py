"""Which memories were looked at: what is measured, and how it is shown (table, web page, picture)."""
