// W3C trace context: which trace a call belongs to, so that its log line can be
// found from the caller's. Plain code. The proxy makes no span of its own; what
// it passes on is the caller's header, as it is, if it is well-formed.
package main

import "strings"

// A traceContext names a span of some trace; "" if there is none.
type traceContext struct{ trace, span string }

// parseTraceparent reads a traceparent header: version, trace id, parent id and
// flags. Versions after 00 may have more at the end. What is malformed, or given
// twice, names no trace and may not go on.
func parseTraceparent(values []string) (traceContext, bool) {
	if len(values) != 1 {
		return traceContext{}, false
	}
	v := values[0]
	if len(v) < 55 || len(v) > 256 || v[2] != '-' || v[35] != '-' || v[52] != '-' || !hexDigits(v[:2]) || !hexDigits(v[53:55]) || v[:2] == "ff" {
		return traceContext{}, false
	}
	if len(v) > 55 && (v[:2] == "00" || v[55] != '-') {
		return traceContext{}, false
	}
	t := traceContext{v[3:35], v[36:52]}
	if !hexDigits(t.trace) || !hexDigits(t.span) || strings.Trim(t.trace, "0") == "" || strings.Trim(t.span, "0") == "" {
		return traceContext{}, false
	}
	return t, true
}

// hexDigits reports whether s has lower-case hexadecimal digits only.
func hexDigits(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }
