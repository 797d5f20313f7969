"""Records in, tables and figures out. Reads files only; never trains."""
