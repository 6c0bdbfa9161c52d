{{- /* The certificate of an operator. Everything is set here: of what the caller asks for only the
      key counts. The ID is the subject of the one-time token. */ -}}
{{- $id := .Subject.CommonName -}}
{{- if or (not (regexMatch "^[a-z0-9._@-]{1,64}$" $id)) (eq $id ".") (eq $id "..") -}}
{{- fail (printf "operator ID %q is not allowed" $id) -}}
{{- end -}}
{
  "subject": {"commonName": {{ toJson $id }}, "organizationalUnit": "OPERATOR"},
  "sans": [{"type": "uri", "value": {{ toJson (printf "qkd://operator.%s/%s" .TrustDomain $id) }}}],
  "keyUsage": ["digitalSignature"],
  "extKeyUsage": ["clientAuth"],
  "crlDistributionPoints": [{{ toJson .CRL }}],
  "extensions": [{"id": "2.5.29.9", "critical": false, "value": {{ toJson .Role }}}]
}
