"""Several arms through both stages with equal budgets: phases, results, report."""
