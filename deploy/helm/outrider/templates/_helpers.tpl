{{- define "outrider.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "outrider.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "outrider.about" -}}
{{ include "outrider.labels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "outrider.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Links between pods have keys: without them nothing is rendered that would be refused later. */}}
{{- define "outrider.checked" -}}
{{- if not (has .Values.draft.place (list "own" "shared" "none")) }}{{ fail "draft.place must be own, shared or none" }}{{ end }}
{{- if not .Values.secrets.apiKeys }}{{ fail "secrets.apiKeys must name a Secret: HTTP beyond the pod needs keys" }}{{ end }}
{{- if and (eq .Values.draft.place "own") (not (and .Values.secrets.targetKeys .Values.secrets.draftKeys)) }}{{ fail "a draft in a pod of its own needs secrets.targetKeys and secrets.draftKeys: see NOTES" }}{{ end }}
{{- end }}

{{- define "outrider.container" -}}
image: {{ include "outrider.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{- define "outrider.mounts" -}}
- { name: cache, mountPath: /home/outrider/.cache }
- { name: tmp, mountPath: /tmp }
- { name: run, mountPath: /run/outrider }
{{- end }}

{{- define "outrider.volumes" -}}
- name: cache
  {{- if .Values.models.claim }}
  persistentVolumeClaim: { claimName: {{ .Values.models.claim | quote }} }
  {{- else }}
  emptyDir: { sizeLimit: {{ .Values.models.sizeLimit | quote }} }
  {{- end }}
- { name: tmp, emptyDir: { sizeLimit: 1Gi } }
- { name: run, emptyDir: { medium: Memory, sizeLimit: 16Mi } }
{{- end }}

{{- /* outrider takes no secret that others could read, and a Secret's files belong to root. */}}
{{- define "outrider.keysContainer" -}}
- name: keys
  {{- include "outrider.container" . | nindent 2 }}
  command: [sh, -c, "install -d -m 700 /keys/own && install -m 600 /secret/* /keys/own/"]
  resources: { limits: { memory: 64Mi } }
  volumeMounts:
    - { name: secret, mountPath: /secret, readOnly: true }
    - { name: keys, mountPath: /keys }
{{- end }}

{{- define "outrider.keysVolumes" -}}
- { name: keys, emptyDir: { medium: Memory, sizeLimit: 1Mi } }
- { name: secret, secret: { secretName: {{ . | quote }}, defaultMode: 0440 } }
{{- end }}
