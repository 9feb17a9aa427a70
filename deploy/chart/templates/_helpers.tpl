{{- define "rex.labels" -}}
app.kubernetes.io/name: rex-pipeline
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "rex.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Of a Pod: no root, no account of the API server unless it starts runs. */}}
{{- define "rex.pod" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ range . }}
  - name: {{ . | quote }}{{ end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "rex.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Settings of all of Dagster's and MLflow's containers, and of runs. */}}
{{- define "rex.environment" -}}
- {name: POSTGRES_HOST, value: {{ .Values.postgres.host | quote }}}
- {name: POSTGRES_PORT, value: {{ .Values.postgres.port | quote }}}
- {name: POSTGRES_USER, value: {{ .Values.postgres.user | quote }}}
- name: POSTGRES_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.postgres.secret }}, key: POSTGRES_PASSWORD}}
- {name: MLFLOW_TRACKING_URI, value: "http://{{ .Release.Name }}-mlflow:5000"}
- {name: DAGSTER_HOME, value: /etc/dagster}
- {name: DAGSTER_FILES, value: /var/lib/rex/dagster}
- {name: DAGSTER_CURRENT_IMAGE, value: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"}
- {name: LLM_ASSETS_ARTIFACTS, value: {{ .Values.s3.artifacts | quote }}}
- {name: LLM_ASSETS_CHECKPOINTS, value: {{ .Values.s3.checkpoints | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.s3.region | quote }}}
{{- with .Values.s3.endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
- {name: MLFLOW_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "rex.volumes" -}}
volumes:
  - name: files
    emptyDir: {sizeLimit: 5Gi}
  - name: tmp
    emptyDir: {sizeLimit: 2Gi}
  - name: dagster
    configMap: {name: {{ .Release.Name }}-dagster}
{{- end }}

{{- define "rex.mounts" -}}
volumeMounts:
  - {name: files, mountPath: /var/lib/rex}
  - {name: tmp, mountPath: /tmp}
  - {name: dagster, mountPath: /etc/dagster}
{{- end }}

{{/* A Pod of the Ray cluster: the code and the environment of runs, and the files that all of them share. */}}
{{- define "rex.ray" -}}
metadata:
  labels: {{ include "rex.labels" (dict "root" .root "component" "ray") | nindent 4 }}
spec:
  automountServiceAccountToken: false
  {{- include "rex.pod" .root | nindent 2 }}
  nodeSelector: {{ toYaml .root.Values.runs.nodeSelector | nindent 4 }}
  containers:
    - name: {{ .container }}
      {{- include "rex.image" .root | nindent 6 }}
      {{- include "rex.container" .root | nindent 6 }}
      env: {{ include "rex.environment" .root | nindent 8 }}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: RAY_AUTH_MODE, value: token}
        - {name: HOME, value: /tmp}
      envFrom:
        - secretRef: {name: {{ .root.Values.s3.secret }}}
        - secretRef: {name: {{ .root.Values.ray.secret }}}
      resources: {{ toYaml .resources | nindent 8 }}
      {{- with .ports }}
      ports:
        {{- range $name, $port := . }}
        - {name: {{ $name }}, containerPort: {{ $port }}}
        {{- end }}
      {{- end }}
      volumeMounts:
        - {name: shared, mountPath: /var/lib/rex}
        - {name: tmp, mountPath: /tmp}
        - {name: objects, mountPath: /dev/shm}
  volumes:
    - name: shared
      persistentVolumeClaim: {claimName: {{ .root.Values.ray.claim }}}
    - name: tmp
      emptyDir: {sizeLimit: 20Gi}
    - name: objects  # Ray's results, in memory: they count to the container's limit
      emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.ray.objects }}}
{{- end }}
