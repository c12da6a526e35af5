"""The laboratory of claims: how they are run, trained, measured, judged, drawn and stored."""
