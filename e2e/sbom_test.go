// This file checks the software bill of materials against the modules that the linker recorded.
package e2e

import (
	"debug/buildinfo"
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// TestSBOM: deploy/sbom lists exactly the modules in the binary, with version and checksum.
func TestSBOM(t *testing.T) {
	tool(t, "awk")
	file, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"std " + info.GoVersion[len("go"):] + " "}
	for _, d := range info.Deps {
		want = append(want, d.Path+" "+d.Version+" "+d.Sum)
	}
	var bom struct {
		Format     string `json:"bomFormat"`
		Components []struct {
			Name, Version, Purl string
			Properties          []struct{ Value string }
		}
	}
	if err := json.Unmarshal([]byte(output(t, nil, "../deploy/sbom", file)), &bom); err != nil || bom.Format != "CycloneDX" {
		t.Fatalf("%v %s", err, bom.Format)
	}
	var got []string
	for _, c := range bom.Components {
		var sum strings.Builder
		for _, p := range c.Properties {
			sum.WriteString(p.Value)
		}
		got = append(got, c.Name+" "+c.Version+" "+sum.String())
		if c.Purl != "pkg:golang/"+c.Name+"@"+c.Version {
			t.Errorf("purl %s", c.Purl)
		}
	}
	if !slices.Equal(got, want) || len(got) < 5 {
		t.Errorf("the list has\n%v\nthe binary\n%v", got, want)
	}
}
