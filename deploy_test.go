// Tests of the files in deploy/kubernetes and compose.cluster.yaml: they have only fields that exist, in the places and
// types that they have there, refer to each other correctly, and set only settings that exist.
package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

// A manifestField is the form of a field: a kind of value, its own fields, or the fields of each item of a list.
type manifestField struct {
	kind   string // text, number, bool, port (a name or a number), texts, map, list of maps, object, labels
	fields map[string]manifestField
	must   []string
}

func manifestObject(must string, fields map[string]manifestField) manifestField {
	return manifestField{"object", fields, strings.Fields(must)}
}

func manifestList(must string, fields map[string]manifestField) manifestField {
	return manifestField{"list", fields, strings.Fields(must)}
}

// manifestKinds is the part of Kubernetes's API that the manifests may use, by apiVersion and kind.
func manifestKinds() map[string]manifestField {
	text, number, boolean := manifestField{kind: "text"}, manifestField{kind: "number"}, manifestField{kind: "bool"}
	port, texts, labels := manifestField{kind: "port"}, manifestField{kind: "texts"}, manifestField{kind: "labels"}
	type fields = map[string]manifestField
	metadata := manifestObject("name", fields{"name": text, "labels": labels, "namespace": text})
	selector := manifestObject("matchLabels", fields{"matchLabels": labels})
	probe := manifestObject("httpGet", fields{"periodSeconds": number, "timeoutSeconds": number,
		"failureThreshold": number,
		"httpGet":          manifestObject("path port", fields{"path": text, "port": port})})
	container := manifestList("name image ports env readinessProbe livenessProbe securityContext resources", fields{
		"name": text, "image": text,
		"ports":        manifestList("containerPort", fields{"name": text, "containerPort": number}),
		"env":          manifestList("name value", fields{"name": text, "value": text}),
		"startupProbe": probe, "livenessProbe": probe, "readinessProbe": probe,
		"lifecycle": manifestObject("", fields{"preStop": manifestObject("sleep",
			fields{"sleep": manifestObject("seconds", fields{"seconds": number})})}),
		"resources": manifestObject("requests", fields{"requests": labels, "limits": labels}),
		"securityContext": manifestObject("", fields{"allowPrivilegeEscalation": boolean,
			"readOnlyRootFilesystem": boolean, "capabilities": manifestObject("drop", fields{"drop": texts})}),
		"volumeMounts": manifestList("name mountPath", fields{"name": text, "mountPath": text, "readOnly": boolean}),
	})
	pod := manifestObject("containers securityContext", fields{
		"automountServiceAccountToken": boolean, "terminationGracePeriodSeconds": number, "containers": container,
		"securityContext": manifestObject("runAsNonRoot", fields{"runAsNonRoot": boolean, "runAsUser": number,
			"runAsGroup": number, "fsGroup": number, "seccompProfile": manifestObject("type", fields{"type": text})}),
		"topologySpreadConstraints": manifestList("maxSkew topologyKey whenUnsatisfiable", fields{"maxSkew": number,
			"topologyKey": text, "whenUnsatisfiable": text, "labelSelector": selector}),
		"volumes": manifestList("name", fields{"name": text,
			"emptyDir": manifestObject("", fields{"sizeLimit": text}),
			"secret":   manifestObject("secretName", fields{"secretName": text, "defaultMode": number})}),
	})
	ports := manifestList("port", fields{"protocol": text, "port": port})
	peer := manifestList("", fields{"namespaceSelector": selector, "podSelector": selector,
		"ipBlock": manifestObject("cidr", fields{"cidr": text, "except": texts})})
	kind := func(must string, more fields) manifestField {
		all := fields{"apiVersion": text, "kind": text, "metadata": metadata}
		maps.Copy(all, more)
		return manifestObject("apiVersion kind metadata "+must, all)
	}
	return map[string]manifestField{
		"apps/v1 Deployment": kind("spec", fields{"spec": manifestObject("replicas selector template", fields{
			"replicas": number, "selector": selector,
			"strategy": manifestObject("type", fields{"type": text, "rollingUpdate": manifestObject("",
				fields{"maxUnavailable": number, "maxSurge": number})}),
			"template": manifestObject("metadata spec", fields{
				"metadata": manifestObject("labels", fields{"labels": labels}), "spec": pod})})}),
		"v1 Service": kind("spec", fields{"spec": manifestObject("selector ports", fields{
			"clusterIP": text, "selector": labels,
			"ports": manifestList("port", fields{"name": text, "port": number, "targetPort": port})})}),
		"policy/v1 PodDisruptionBudget": kind("spec", fields{"spec": manifestObject("selector",
			fields{"maxUnavailable": number, "minAvailable": number, "selector": selector})}),
		"networking.k8s.io/v1 NetworkPolicy": kind("spec", fields{"spec": manifestObject("podSelector policyTypes",
			fields{"podSelector": selector, "policyTypes": texts,
				"ingress": manifestList("", fields{"from": peer, "ports": ports}),
				"egress":  manifestList("", fields{"to": peer, "ports": ports})})}),
		"v1 Secret": kind("", fields{"type": text, "stringData": labels}),
	}
}

// check returns what is wrong with a value.
func (f manifestField) check(at string, v any) (problems []string) {
	wrong := func() []string { return append(problems, fmt.Sprintf("%s is %T %v, want %s", at, v, v, f.kind)) }
	switch v := v.(type) {
	case string:
		if f.kind != "text" && f.kind != "port" {
			return wrong()
		}
	case float64:
		if f.kind != "number" && f.kind != "port" {
			return wrong()
		}
	case bool:
		if f.kind != "bool" {
			return wrong()
		}
	case []any:
		if f.kind != "list" && f.kind != "texts" {
			return wrong()
		}
		item := manifestField{"object", f.fields, f.must}
		if f.kind == "texts" {
			item = manifestField{kind: "text"}
		}
		for i, v := range v {
			problems = append(problems, item.check(fmt.Sprintf("%s[%d]", at, i), v)...)
		}
	case map[string]any:
		if f.kind != "object" && f.kind != "labels" {
			return wrong()
		}
		for name, v := range v {
			field, ok := f.fields[name]
			if f.kind == "labels" {
				field, ok = manifestField{kind: "text"}, true
			}
			if !ok {
				problems = append(problems, fmt.Sprintf("%s has no field %s", at, name))
				continue
			}
			problems = append(problems, field.check(at+"."+name, v)...)
		}
		for _, name := range f.must {
			if v[name] == nil {
				problems = append(problems, fmt.Sprintf("%s lacks %s", at, name))
			}
		}
	default:
		return wrong()
	}
	return problems
}

// readManifests returns the objects in a file, by kind and name, and what is wrong with them.
func readManifests(text string) (objects map[string]map[string]any, problems []string) {
	objects = map[string]map[string]any{}
	for i, part := range strings.Split(text, "\n---\n") {
		v, err := readYAML(part)
		if err != nil {
			problems = append(problems, fmt.Sprintf("document %d: %v", i, err))
			continue
		}
		m, _ := v.(map[string]any)
		name := fmt.Sprint(m["apiVersion"], " ", m["kind"])
		kind, ok := manifestKinds()[name]
		if !ok {
			problems = append(problems, "there is no "+name)
			continue
		}
		if problems = append(problems, kind.check(name, m)...); len(problems) == 0 {
			objects[fmt.Sprint(m["kind"], " ", m["metadata"].(map[string]any)["name"])] = m
		}
	}
	return objects, problems
}

// yamlAt returns a value by the names of fields and the indexes of items.
func yamlAt(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			list, _ := v.([]any)
			if v = nil; p < len(list) {
				v = list[p]
			}
		}
	}
	return v
}

// TestKubernetesManifests: the manifests have the form of Kubernetes's API, select the pods of the deployment, name
// ports and secrets that exist, run without privileges, and wait long enough for a drain.
func TestKubernetesManifests(t *testing.T) {
	t.Parallel()
	objects, problems := readManifests(mustReadFile(t, "deploy/kubernetes/llm-proxy.yaml"))
	secrets, more := readManifests(mustReadFile(t, "deploy/kubernetes/secret.example.yaml"))
	if problems = append(problems, more...); len(problems) > 0 || len(objects) != 5 || len(secrets) != 1 {
		t.Fatalf("%q %v", problems, slices.Sorted(maps.Keys(objects)))
	}
	pod := yamlAt(objects["Deployment llm-proxy"], "spec", "template").(map[string]any)
	container := yamlAt(pod, "spec", "containers", 0).(map[string]any)
	labels := fmt.Sprint(yamlAt(pod, "metadata", "labels"))
	for name, selector := range map[string]any{
		"the deployment":  yamlAt(objects["Deployment llm-proxy"], "spec", "selector", "matchLabels"),
		"the service":     yamlAt(objects["Service llm-proxy"], "spec", "selector"),
		"the metrics":     yamlAt(objects["Service llm-proxy-metrics"], "spec", "selector"),
		"the budget":      yamlAt(objects["PodDisruptionBudget llm-proxy"], "spec", "selector", "matchLabels"),
		"the policy":      yamlAt(objects["NetworkPolicy llm-proxy"], "spec", "podSelector", "matchLabels"),
		"the constraints": yamlAt(pod, "spec", "topologySpreadConstraints", 0, "labelSelector", "matchLabels"),
	} {
		if fmt.Sprint(selector) != labels {
			t.Errorf("%s selects %v, the pods have %s", name, selector, labels)
		}
	}
	ports := map[any]bool{53.0: true, 443.0: true, 5432.0: true}
	for _, p := range container["ports"].([]any) {
		ports[yamlAt(p, "name")] = true
	}
	for name, port := range map[string]any{
		"readiness": yamlAt(container, "readinessProbe", "httpGet", "port"),
		"liveness":  yamlAt(container, "livenessProbe", "httpGet", "port"),
		"service":   yamlAt(objects["Service llm-proxy"], "spec", "ports", 0, "targetPort"),
		"metrics":   yamlAt(objects["Service llm-proxy-metrics"], "spec", "ports", 0, "targetPort"),
		"clients":   yamlAt(objects["NetworkPolicy llm-proxy"], "spec", "ingress", 0, "ports", 0, "port"),
		"scrapes":   yamlAt(objects["NetworkPolicy llm-proxy"], "spec", "ingress", 1, "ports", 0, "port"),
		"database":  yamlAt(objects["NetworkPolicy llm-proxy"], "spec", "egress", 1, "ports", 0, "port"),
	} {
		if !ports[port] {
			t.Errorf("%s: there is no port %v", name, port)
		}
	}
	if ready, alive := yamlAt(container, "readinessProbe", "httpGet", "path"),
		yamlAt(container, "livenessProbe", "httpGet", "path"); ready != "/readyz" || alive != "/healthz" {
		t.Errorf("the probes ask %v and %v: a database that is away must not restart the pods", ready, alive)
	}
	mounted := yamlAt(container, "volumeMounts", 1, "mountPath").(string)
	var drain float64
	for _, v := range container["env"].([]any) {
		name, value := yamlAt(v, "name").(string), yamlAt(v, "value").(string)
		if !slices.Contains(settingNames(), name) {
			t.Errorf("there is no setting %s", name)
		}
		if file, ok := strings.CutPrefix(value, mounted+"/"); ok != strings.HasSuffix(name, "_FILE") ||
			ok && yamlAt(secrets["Secret llm-proxy"], "stringData", file) == nil {
			t.Errorf("%s: no such secret: %s", name, value)
		}
		if name == "DRAIN_TIMEOUT" {
			_, _ = fmt.Sscanf(value, "%fs", &drain)
		}
	}
	sleep, _ := yamlAt(container, "lifecycle", "preStop", "sleep", "seconds").(float64)
	if grace, _ := yamlAt(pod, "spec", "terminationGracePeriodSeconds").(float64); drain == 0 || sleep == 0 ||
		grace < sleep+drain+10 {
		t.Errorf("after %v s pods are killed, but a stop takes %v + %v s", grace, sleep, drain)
	}
	for _, path := range [][]any{{"spec", "automountServiceAccountToken"},
		{"spec", "containers", 0, "securityContext", "allowPrivilegeEscalation"}} {
		if yamlAt(pod, path...) != false {
			t.Errorf("%v is not false", path)
		}
	}
	if yamlAt(container, "securityContext", "readOnlyRootFilesystem") != true ||
		yamlAt(container, "securityContext", "capabilities", "drop", 0) != "ALL" ||
		yamlAt(pod, "spec", "securityContext", "runAsNonRoot") != true {
		t.Error("the container has unneeded privileges")
	}
	if yamlAt(pod, "spec", "volumes", 1, "secret", "secretName") != "llm-proxy" {
		t.Error("the pod mounts another secret")
	}
	text := mustReadFile(t, "deploy/kubernetes/llm-proxy.yaml")
	for from, to := range map[string]string{"replicas: 3": "replica: 3", "port: 80\n": "port: \"80\"\n",
		"apiVersion: apps/v1": "apiVersion: apps/v2", "readOnly: true": "readonly: true",
		"          image: llm-proxy:postgres\n": ""} {
		if _, problems := readManifests(strings.Replace(text, from, to, 1)); len(problems) == 0 {
			t.Errorf("%q instead of %q was accepted", to, from)
		}
	}
}

// TestComposeCluster: the replicas have the same database and different data directories, are checked at /readyz, and
// trust the balancer's network. TestCompose checks the rest.
func TestComposeCluster(t *testing.T) {
	t.Parallel()
	root, err := readYAML(mustReadFile(t, "compose.cluster.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	a, b := yamlAt(root, "services", "llm-proxy-a"), yamlAt(root, "services", "llm-proxy-b")
	if yamlAt(b, "extends", "service") != "llm-proxy-a" || yamlAt(a, "build", "target") != "postgres" ||
		fmt.Sprint(yamlAt(a, "volumes")) == fmt.Sprint(yamlAt(b, "volumes")) {
		t.Error("the replicas are not two of the same kind, each with its own data directory")
	}
	env := yamlAt(a, "environment").(map[string]any)
	if subnet := yamlAt(root, "networks", "default", "ipam", "config", 0, "subnet"); env["TRUSTED_PROXIES"] != subnet {
		t.Errorf("trusted is %v, the network is %v", env["TRUSTED_PROXIES"], subnet)
	}
	database := env["DATABASE_URL"].(string)
	user, name := yamlAt(root, "services", "postgres", "environment", "POSTGRES_USER"),
		yamlAt(root, "services", "postgres", "environment", "POSTGRES_DB")
	if want := fmt.Sprintf("postgres://%v@postgres/%v?sslmode=disable", user, name); database != want {
		t.Errorf("DATABASE_URL is %s, want %s", database, want)
	}
	if yamlAt(root, "services", "postgres", "ports") != nil {
		t.Error("the database is published")
	}
	for file, parts := range map[string][]string{
		"deploy/cluster.caddyfile": {"llm-proxy-a:8080 llm-proxy-b:8080", "health_uri /readyz",
			"flush_interval -1"},
		"deploy/prometheus-cluster.yml": {`"llm-proxy-a:9090", "llm-proxy-b:9090"`},
	} {
		text, err := os.ReadFile(file)
		for _, part := range parts {
			if err != nil || !strings.Contains(string(text), part) {
				t.Errorf("%s lacks %s: %v", file, part, err)
			}
		}
	}
}
