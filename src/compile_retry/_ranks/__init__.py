"""The agreement between the ranks of a group: the protocol, and the schedule that follows from it. No torch."""
