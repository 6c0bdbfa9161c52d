{{- /* The certificate of a plain server, by ACME: host names that it answers for, and no
      identity. The CA's name constraints bound the names. */ -}}
{
  "subject": {"commonName": {{ toJson .Subject.CommonName }}},
  "sans": {{ toJson .SANs }},
  "keyUsage": ["digitalSignature"],
  "extKeyUsage": ["serverAuth"],
  "crlDistributionPoints": [{{ toJson .CRL }}]
}
