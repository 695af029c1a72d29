"""Figures, tables and the HTML report; no figure of merit is computed here."""
