// This file runs a few loops, so that the benchmark itself keeps working.
package main

import (
	"strings"
	"testing"
)

// TestCrash kills the program three times.
func TestCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and kills the program")
	}
	var out strings.Builder
	if err := run(t.Context(), []string{"-loops", "3", "-seed", "1"}, &out); err != nil {
		t.Errorf("%v: %s", err, &out)
	}
	t.Log(&out)
}
