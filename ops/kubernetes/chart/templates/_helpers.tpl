{{- define "continual.name" -}}
{{- if contains "continual" .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-continual" .Release.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "continual.selector" -}}
app.kubernetes.io/name: continual
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "continual.labels" -}}
{{ include "continual.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
