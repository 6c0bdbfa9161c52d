{{- /* The certificate of a KME. Everything is set here: of what the caller asks for only the
      key counts. The ID is the subject of the one-time token. */ -}}
{{- $id := .Subject.CommonName -}}
{{- if or (not (regexMatch "^[a-z0-9._@-]{1,64}$" $id)) (eq $id ".") (eq $id "..") -}}
{{- fail (printf "KME ID %q is not allowed" $id) -}}
{{- end -}}
{{- /* Host names come from the token, which the CA's operator signed, and the CA's name
      constraints bound them. The stock step CLI puts the bare ID there by default: no name. */ -}}
{{- $names := .SANs -}}
{{- if eq (len $names) 1 }}{{ if eq (index $names 0).Value $id }}{{ $names = list }}{{ end }}{{ end -}}
{
  "subject": {"commonName": {{ toJson $id }}, "organizationalUnit": "KME"},
  "sans": [
    {"type": "uri", "value": {{ toJson (printf "qkd://kme.%s/%s" .TrustDomain $id) }}},
    {"type": "dns", "value": "localhost"},
    {"type": "ip", "value": "127.0.0.1"}
    {{- range $names }}
    {{- if and (has .Type (list "dns" "ip")) (not (has .Value (list "localhost" "127.0.0.1"))) }},
    {"type": {{ toJson .Type }}, "value": {{ toJson .Value }}}
    {{- end }}
    {{- end }}
  ],
  "keyUsage": ["digitalSignature"],
  "extKeyUsage": ["serverAuth", "clientAuth"],
  "crlDistributionPoints": [{{ toJson .CRL }}],
  "extensions": [{"id": "2.5.29.9", "critical": false, "value": {{ toJson .Role }}}]
}
