"""What people look at: report.html, the live view, plots, diagnosis."""
