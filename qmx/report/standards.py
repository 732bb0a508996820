"""Ids of the standards under which a report is filed, and its fields that answer each."""

from typing import Any

# Each as its publisher names it; `fields` are keys of "audit" in results.json.
STANDARDS: tuple[dict[str, Any], ...] = (
    {
        "standard": "OWASP AISVS",
        "version": "1.0",
        "id": "v1.0-C11.2.2",
        "title": "rate limits sized to the extraction threat model",
        "fields": ["limits", "time_to_extract", "largest_limits"],
    },
    {
        "standard": "OWASP AISVS",
        "version": "1.0",
        "id": "v1.0-C11.3.1",
        "title": "query patterns are analysed for extraction",
        "fields": ["detection"],
    },
    {
        "standard": "OWASP AISVS",
        "version": "1.0",
        "id": "v1.0-C11.3.2",
        "title": "answers are calibrated to the extraction risk",
        "fields": ["access"],
    },
    {
        "standard": "OWASP AISVS",
        "version": "1.0",
        "id": "v1.0-C11.3.3",
        "title": "watermark or fingerprint",
        "fields": ["watermarks"],
    },
    {
        "standard": "OWASP AISVS",
        "version": "1.0",
        "id": "v1.0-C11.3.4",
        "title": "response to extraction",
        "fields": ["residual_risk", "retest"],
    },
    {
        "standard": "MITRE ATLAS",
        "version": "5.6.1",
        "id": "AML.T0024.002",
        "title": "Extract AI Model",
        "fields": ["answer", "reach"],
    },
    {
        "standard": "MITRE ATLAS",
        "version": "5.6.1",
        "id": "AML.M0002",
        "title": "Passive AI Output Obfuscation",
        "fields": ["access"],
    },
    {
        "standard": "MITRE ATLAS",
        "version": "5.6.1",
        "id": "AML.M0004",
        "title": "Restrict Number of AI Model Queries",
        "fields": ["limits", "largest_limits"],
    },
    {
        "standard": "MITRE ATLAS",
        "version": "5.6.1",
        "id": "AML.M0024",
        "title": "AI Telemetry Logging",
        "fields": ["traffic"],
    },
    {
        "standard": "NIST AI 100-2",
        "version": "E2025",
        "id": "NISTAML.031",
        "title": "Model Extraction",
        "fields": ["answer", "reach"],
    },
    {
        "standard": "OWASP AI Exchange",
        "version": "2026-08-22",
        "id": "2.4",
        "title": "Model exfiltration",
        "fields": ["time_to_extract", "access"],
    },
)
