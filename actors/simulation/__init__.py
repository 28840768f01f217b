"""Gateways, batchers and executors on a simulated bus, driven by simulated clocks and seeded faults.

Only the policies are real (`Router`, `Scheduler`, `Ledger`); the actors around them are copied here in miniature. One
seed is one run, always the same. Faults last for a while, then all is calm: what was asked for and every slot must come
back. `Referee` checks the rules after each event.
"""
