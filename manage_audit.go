// This room is where requests meet the audit trail: who is said to have done
// something, failed sign-ins, and GET /manage/audit. It adds entries and reads
// them; there is nothing that changes one.
package main

import (
	"net/http"
	"time"
)

// originOf says who makes a request, for the audit trail.
func (s *server) originOf(w http.ResponseWriter, r *http.Request, who actor, now time.Time) origin {
	return origin{actor: who.id, role: who.role, address: s.clientAddress(r), requestID: w.Header().Get("X-Request-Id"), at: now.UnixMilli()}
}
