// Whose trouble a call was: the four answers to "who has to do something?" that
// metrics and pages sort failures by. Plain code.
package main

// An errorClass says who has to do something about a call that did not go well.
type errorClass string

const (
	classNone     errorClass = ""         // it went well
	classCaller   errorClass = "caller"   // the client sent what nobody can serve, or left
	classPolicy   errorClass = "policy"   // an administrator's rule or limit
	classProvider errorClass = "provider" // the provider failed, was silent or broke off
	classProxy    errorClass = "proxy"    // this program, its database or its disk
)

// class sorts a settled call. It goes by what the ledger knows of it, so that
// metrics, pages and a query over old rows say the same.
func (r *requestRow) class() errorClass {
	switch r.outcome {
	case outcomeClientGone:
		return classCaller
	case outcomeLost:
		return classProxy
	case outcomeTruncated:
		return cutClass(r.errorCode)
	case outcomeRefused:
		return refusedClass(r.status, r.errorCode)
	case outcomeUpstreamError:
		if r.status >= 400 && r.status < 500 && r.status != 429 {
			return classCaller // the provider judged the request
		}
		return classProvider
	}
	return classNone
}

func refusedClass(status int, code string) errorClass {
	switch {
	case code == "no_upstream" || status == 403 || status == 429:
		return classPolicy
	case status == 502 || status == 504:
		return classProvider
	case status >= 500:
		return classProxy
	}
	return classCaller
}

// cutClass sorts answers that broke off after they had begun, by why.
func cutClass(code string) errorClass {
	switch code {
	case "upstream_cut", "stream_unfinished", "stream_idle", "upstream_timeout":
		return classProvider
	case "client_stalled":
		return classCaller
	case "draining", "ledger_unavailable", "store_unavailable":
		return classProxy
	}
	return classPolicy // revoked, expired, a limit, an administrator's cut
}
