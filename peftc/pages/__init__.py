"""What people look at: records, tables, charts, cards and pages, without torch."""
