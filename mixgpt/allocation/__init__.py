"""How sparse to make each matrix: sensitivities, their ranking, one global threshold."""
