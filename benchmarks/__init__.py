"""Programs that time this project beside others, and the audit of implementations of SAM."""
