"""Plain results to figures, tables and the HTML report: nothing here computes a figure of merit."""
