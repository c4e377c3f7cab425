"""Checks for the tests of those who use the library: ``assert_resumes_exactly``."""
