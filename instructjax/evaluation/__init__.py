"""Measures trained models: accuracies and win rates with intervals, tables and figures."""
