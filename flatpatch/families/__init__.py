"""What a kind of upstream repository needs: a family turns settings into data, and what a run left into data."""
