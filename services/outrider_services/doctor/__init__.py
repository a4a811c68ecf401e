"""`outrider doctor`: measures a pair where it is placed, and says what pays and what would."""
