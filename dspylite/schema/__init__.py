"""The nouns: messages, records, signatures.

Pure data; nothing here waits, calls or reads settings.
"""
