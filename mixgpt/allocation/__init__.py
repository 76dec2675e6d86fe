"""How sparse each matrix shall be: sensitivities, their ranking, one global threshold."""
